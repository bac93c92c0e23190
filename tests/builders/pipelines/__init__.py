"""Small pipelines of diffusers' own classes, a file a family, and what every one of them has to do."""

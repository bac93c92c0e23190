"""plans/drawing."""

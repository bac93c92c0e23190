"""Pictures of plans: SVG, PNG, PDF by matplotlib, or Mermaid text.

scene.py     the marks and edges of a picture
layout.py    where they go
draw.py      drawing them, or writing them as a Mermaid flowchart
"""

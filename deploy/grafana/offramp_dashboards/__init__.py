"""Writes offramp's Grafana dashboards: `make dashboards`.

A dashboard here is a list of rows of panels; each panel is a title, the question that it answers,
and PromQL. What a panel looks like is `panels.py`'s business, where it stands is `board.py`'s. The
JSON that comes out is committed, and Grafana reads only that.
"""

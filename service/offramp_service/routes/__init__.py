"""The doors: one module per request format, plus probes and information.

To add a door: a module with `router(pipeline) -> APIRouter` and `PATHS`, listed in `app.py`.
"""

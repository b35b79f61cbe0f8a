"""The doors: one module per request format, plus probes and information.

To add a door: a module with `router(pipeline) -> APIRouter`, `PATHS` and `wording(settings)`,
listed in `app.py`.
"""

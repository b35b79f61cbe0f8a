"""The doors: one module per request format, plus probes and information.

To add a door: a module with `router(models) -> APIRouter`, `PATHS` and `wording(settings)`,
listed in `app.py`.
"""

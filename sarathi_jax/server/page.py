"""The live page at ``/``: a file that needs nothing from elsewhere, and the numbers that it asks for."""

from importlib import resources
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from sarathi_jax.telemetry.live import LiveView


def page_router(view: LiveView) -> APIRouter:
    """Serves the page and ``/live``.

    Args:
      view: the numbers.
    """
    router = APIRouter()
    page = resources.files("sarathi_jax.server").joinpath("page.html").read_text(encoding="utf-8")

    @router.get("/", include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page, headers={"Cache-Control": "no-cache"})

    @router.get("/live")
    async def live(since: int = 0) -> dict[str, Any]:
        """The latest steps, from an index on, and percentiles of the last minute's times."""
        return view.snapshot(since)

    return router

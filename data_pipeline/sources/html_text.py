"""The main text of an HTML page, by trafilatura, without its navigation and other boilerplate."""

import logging

from data_pipeline.errors import BackendError


def require_html_reader() -> None:
    """Raises BackendError without trafilatura."""
    try:
        import trafilatura  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"`html` needs trafilatura ({error}); install it with `pip install 'megaback[html]'`"
        ) from None


def html_text(page: bytes) -> str:
    """The main text of a page; empty if it has none. Raises BackendError."""
    require_html_reader()
    import trafilatura

    # It logs each page without text, which is counted here as an empty document.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    return trafilatura.extract(page, include_comments=False) or ""

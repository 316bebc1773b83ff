"""Called when Python starts: by drank_autoload.pth up to 3.14, by drank_autoload.start from 3.15 on (PEP 829)."""


def register() -> None:
    """Register drank's format; neither torch nor transformers is imported."""
    import drank  # noqa: F401

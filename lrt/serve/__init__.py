"""The server: an OpenAI-compatible API and a page over one running batch (docs/serving.md)."""

"""The inference server: OpenAI-compatible completions under any attention implementation and eviction method, a page.

Needs the extra `serve`: FastAPI, uvicorn, prometheus-client.
"""

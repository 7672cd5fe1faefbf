"""Looking into adapters: what is in their files, and how their changes are spread."""

"""Check, census and repair: what an image's tables say of its clusters. Shares layouts with the engine, no logic."""

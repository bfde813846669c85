"""Pathfinder images: how they are generated, read as published, traced and compared."""

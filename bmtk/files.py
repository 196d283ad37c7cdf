"""Files that are never half there: written beside their place, flushed, and renamed into it."""

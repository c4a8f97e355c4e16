"""Every record on the disk: layouts, masks, headers, features, refusals. Nothing here performs anything."""

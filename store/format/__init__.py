"""How a store is laid out and kept in files: layouts, sealed metadata, chunks, bounded reads, atomic writes."""

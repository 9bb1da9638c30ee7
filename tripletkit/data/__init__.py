"""From parquet files to memory-mapped embeddings, splits and difficulty bands."""

"""The admin API: what is in memory and on disk, and how the server is."""

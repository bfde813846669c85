"""How data are found, downloaded, unpacked, generated in shards and kept."""

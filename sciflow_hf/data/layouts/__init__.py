"""How tensors lie in files: npz, shards, inline; one file a layout. May import `data.storage` and `errors`."""

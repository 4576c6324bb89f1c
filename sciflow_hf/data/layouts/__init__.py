"""How tensors lie in files: npz, shards, inline, one file a layout. May import the files of `data` that read and write."""

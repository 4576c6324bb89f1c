"""How tensors lie in files, one file a layout: npz, shards, inline. May import the readers and `writing` of `data`."""

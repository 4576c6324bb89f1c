"""A judge: an image-text model lists the errors of drawn figures, axis by axis. Imports no other room but `errors`,
`files` and `options`."""

"""What a reader of the paper can skip: options, files, formats, templates, ranks, checkpoints,
decoding, pages."""

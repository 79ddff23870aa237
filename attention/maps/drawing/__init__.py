"""Drawing: images of maps, charts, colours and captions."""

"""Hold Fovea Emoji, the demo model that draws animals and things: its data, trainers, judge and measures."""

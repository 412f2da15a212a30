"""Image search: the pictures of a catalogue that are most like a given one."""

"""How models come in, untrusted, and how purified ones reach people: the card."""

"""How models and data come in, untrusted, and how purified models reach people: the card, push and pull."""

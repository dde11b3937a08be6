"""How purified models reach people: the card."""

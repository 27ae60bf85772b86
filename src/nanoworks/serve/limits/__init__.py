"""How much one key may ask for: a minute's requests and tokens, requests at a time, and a month's quota."""

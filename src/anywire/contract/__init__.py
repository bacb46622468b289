"""The contract: addresses, traits, errors, and the channels that every wire shares."""

"""What an attacker does beside plain fine-tuning, one a file: mixes of data, weights, objectives."""

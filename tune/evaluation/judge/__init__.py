"""Generated answers scored from 1 to 5 by a judge model."""

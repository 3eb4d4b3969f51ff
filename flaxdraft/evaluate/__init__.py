"""How good a draft is: teacher-forced walks and real speculative decoding."""

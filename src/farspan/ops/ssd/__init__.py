"""State space duality: a recurrence whose step size also sets its decay, with keys and queries shared by groups."""

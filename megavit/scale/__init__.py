"""What a run costs before anybody rents the machines: memory, time and bytes sent, predicted and
rehearsed."""

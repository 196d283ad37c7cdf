"""What a user asks of runs, recipes and machines, a file for each command; tools read every room, none reads them."""

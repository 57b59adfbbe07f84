"""What every family's benchmark shares.

problem   the words a family's file is written in: Problem, Work, Peer, Derived, Goal
check     a result against its float64 reference
timing    clocks with cold or warm caches, statistics
machine   what this machine can do at most, and what it is
run       back ends and peers of a problem, checked, then timed in turns
scenarios an op as a server runs it, and several at once
energy    joules, where the machine counts them
record    what was measured, as JSON, and the comparison of two such files
table     the tables on the terminal
page      the HTML page and its pictures
"""

"""From no pairs at all to an aligned model, one click at a time.

settings   what decides a session
journal    its events, one line each, and what follows from them
learner    the head, refitted after every click; its ridge
pool       prompts, replies drawn ahead, which pair is asked next
session    all of it together, on disk before it is told
writer     the threads that draw replies ahead and think about clicks
figures    what can be said of it, in sentences
app        the page
finish     the session as an ordinary run
jobs       what takes long: finish, distil, export
"""

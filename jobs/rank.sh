#!/usr/bin/env bash
# One rank of a job: rank.sh PROGRAM [WORD...]; ends with the program's status, but with 75 only after some seconds.
#
# --kill-on-bad-exit=1 ends a step as soon as one rank ends with anything but 0, and the step's status then is that of the
# ranks that were killed while they were about to end in order. So all of them get the time to end.

# Ignored, here and in the program until it listens: a rank that dies while the others already start leaves them waiting.
trap '' USR1 TERM
"$@"
status=$?
[ "$status" != 75 ] || sleep 5
exit "$status"

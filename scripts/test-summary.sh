#!/bin/sh
# The last line of `make test`: reached only when everything before it passed.
echo "make test: everything passed"

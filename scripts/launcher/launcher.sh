#!/bin/sh
# Starts the plugin: finds the Python that it was built for, then becomes it. The host watches and kills the process
# that it started, so no shell may stay between the two.

fail() {
    echo "[ERROR] @NAME@: $1" >&2
    exit 1
}

self=$0
case $self in
    */*) ;;
    *) self=./$self ;;
esac
while [ -L "$self" ]; do
    target=$(readlink "$self")
    case $target in
        /*) self=$target ;;
        *) self=${self%/*}/$target ;;
    esac
done
start=${self%/*}/@START@
[ -f "$start" ] || fail "the plugin is incomplete: $start is missing. Build or install it again"

built_with=@PYTHON@
if [ -n "${ENGINE_PLUGIN_PYTHON-}" ]; then
    python=$ENGINE_PLUGIN_PYTHON
    command -v "$python" >/dev/null || fail "ENGINE_PLUGIN_PYTHON is $python, which cannot be run"
elif [ -n "$built_with" ] && [ -x "$built_with" ]; then
    python=$built_with
elif python@MINOR@ -c '' >/dev/null 2>&1; then
    python=python@MINOR@
else
    fail "needs Python @MINOR@, which is not on PATH. Install it, or name it in ENGINE_PLUGIN_PYTHON"
fi
exec "$python" @FLAGS@ "$start" "$@"

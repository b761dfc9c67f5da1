# What the drivers in shell have in common: the steps of the command line, one line of answer for each. Sourced.

# The session, or the attempt at one, begins about now.
waiting() { echo "$step: waiting" >&3; }

exec 3>&1
for step in "$@"; do
    case $step in
        hold-*) if "$step" >/dev/null; then echo "$step: finished"; else echo "$step: ended"; fi && echo "$step: $(role)" ;;
        *) echo "$step: $("$step" | tr '\n' ' ' | sed 's/ $//')" ;;
    esac
done

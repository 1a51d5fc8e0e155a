/* sh for the busybox image. Tests compare the messages of busybox's shell, so this program
 * runs it. But Debian's busybox drops entries with invalid variable names, as in "data-1=x",
 * from the environment of its children; if there is such an entry, bash runs instead, which
 * keeps it. */
#include <ctype.h>
#include <unistd.h>

extern char **environ;

static int is_name(const char *s)
{
	if (!isalpha(*s) && *s != '_')
		return 0;
	while (isalnum(*s) || *s == '_')
		s++;
	return *s == '=';
}

int main(int argc, char **argv)
{
	char **v;

	for (v = environ; *v; v++) {
		if (!is_name(*v)) {
			execv("/bin/bash", argv);
			return 127;
		}
	}
	execv("/bin/ash", argv);
	return 127;
}

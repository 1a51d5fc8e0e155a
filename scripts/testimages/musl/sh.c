/* sh for the stand-in of busybox. Tests know its shell's messages by heart, so that is
 * what runs; but Debian's version of it drops what is no name of a variable, as in
 * "data-1=x", from the environment that it passes on, and where there is such a thing bash
 * runs instead, which keeps it. */
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

/* getent for images whose tests use musl's resolver, as on Alpine: "getent hosts NAME"
 * prints the addresses of NAME and fails if there are none. Linked with musl. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
	struct addrinfo want = {.ai_socktype = SOCK_STREAM}, *found, *a;
	char text[INET6_ADDRSTRLEN];

	if (argc != 3 || (strcmp(argv[1], "hosts") && strcmp(argv[1], "ahosts"))) {
		fprintf(stderr, "usage: getent hosts NAME\n");
		return 1;
	}
	if (getaddrinfo(argv[2], NULL, &want, &found))
		return 2;
	for (a = found; a; a = a->ai_next) {
		const void *addr = a->ai_family == AF_INET
			? (void *)&((struct sockaddr_in *)a->ai_addr)->sin_addr
			: (void *)&((struct sockaddr_in6 *)a->ai_addr)->sin6_addr;
		printf("%-15s %s\n", inet_ntop(a->ai_family, addr, text, sizeof text), argv[2]);
	}
	return 0;
}

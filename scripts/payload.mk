# Included by the Makefile: what kedge carries inside its executable.

GOARCH ?= $(shell go env GOARCH)

.PHONY: payload payload-all
payload: ## Build the runc shim, runc and the pause program for $(GOARCH)
	scripts/build-payload.sh $(GOARCH)

payload-all: ## The same for every architecture
	scripts/build-payload.sh amd64
	scripts/build-payload.sh arm64

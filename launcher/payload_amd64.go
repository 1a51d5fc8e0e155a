package main

import "embed"

//go:embed payload/amd64
var payloadFS embed.FS

const payloadDir = "payload/amd64"

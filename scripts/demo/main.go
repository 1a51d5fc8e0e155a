// Demo writes the image archive of the application that `make run` runs: the probe
// of the end-to-end tests, serving one line of text. No registry is needed.
package main

import (
	"fmt"
	"os"

	"kedge/internal/testimage"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: demo PROGRAM ARCHIVE")
		os.Exit(2)
	}
	data, err := os.ReadFile(os.Args[1])
	if err == nil {
		err = testimage.WriteFile(os.Args[2], testimage.Docker, testimage.Image{
			Name:       "kedge.local/hello:1",
			Files:      map[string]testimage.File{"/hello": {Data: data, Mode: 0o755}},
			Entrypoint: []string{"/hello"},
			Cmd:        []string{"serve", ":8080", "Hello from kedge!"},
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

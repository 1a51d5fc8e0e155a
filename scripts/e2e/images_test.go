package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"kedge/internal/testimage"
)

// Images that every node under test finds in its folder.
const (
	// busybox is the image of most test pods: Debian's static busybox, and probe.
	busybox = "docker.io/library/busybox:e2e"
	// agnhost is upstream's test image, here with its one program only.
	agnhost = "registry.k8s.io/e2e-test-images/agnhost:e2e"
)

// program reads one that `make build-e2e` has built.
func program(name string) (testimage.File, error) {
	data, err := os.ReadFile(filepath.Join("../../build/e2e", name))
	if err != nil {
		return testimage.File{}, fmt.Errorf("run make build-e2e: %w", err)
	}
	return testimage.File{Data: data, Mode: 0o755}, nil
}

// prepareImages puts the test images where a node imports them from. The archive
// is made once; nodes share it by hard link.
func prepareImages(dataDir string) error {
	cached, err := imagesArchive()
	if err != nil {
		return err
	}
	dir := filepath.Join(dataDir, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Link(cached, filepath.Join(dir, "images.tar"))
}

// imagesArchive is made once for a run.
var imagesArchive = sync.OnceValues(func() (string, error) {
	box, err := testimage.NewBusybox(busybox)
	if err != nil {
		return "", err
	}
	if box.Files["/bin/probe"], err = program("probe"); err != nil {
		return "", err
	}
	agn, err := program("agnhost")
	if err != nil {
		return "", err
	}
	host := testimage.Image{Name: agnhost, Files: map[string]testimage.File{"/agnhost": agn}, Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}
	file := filepath.Join(baseDir, "images.tar")
	return file, testimage.WriteFile(file, testimage.Docker, box, host)
})

package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"kedge/internal/test/image"
)

// Images that every node under test finds in its folder.
const (
	// Busybox is the image of most test pods: Debian's static busybox, and probe.
	Busybox = "docker.io/library/busybox:e2e"
	// Agnhost is upstream's test image, here with its one program only.
	Agnhost = "registry.k8s.io/e2e-test-images/agnhost:e2e"
)

// BuiltProgram reads one that `make build-e2e` has built.
func BuiltProgram(name string) (image.File, error) {
	data, err := os.ReadFile(InProject("build/e2e/" + name))
	if err != nil {
		return image.File{}, fmt.Errorf("run make build-e2e: %w", err)
	}
	return image.File{Data: data, Mode: 0o755}, nil
}

// PrepareImages puts the test images where a node imports them from. The archive
// is made once; nodes share it by hard link.
func PrepareImages(dataDir string) error {
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
	box, err := image.NewBusybox(Busybox)
	if err != nil {
		return "", err
	}
	if box.Files["/bin/probe"], err = BuiltProgram("probe"); err != nil {
		return "", err
	}
	agn, err := BuiltProgram("agnhost")
	if err != nil {
		return "", err
	}
	host := image.Image{Name: Agnhost, Files: map[string]image.File{"/agnhost": agn}, Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}
	file := filepath.Join(BaseDir, "images.tar")
	return file, image.WriteFile(file, image.Docker, box, host)
})

"""`vhost-user-qcow2 libvirt-xml`: the `<disk>` of a libvirt domain that the daemon serves with the same options."""

import os.path
from xml.sax.saxutils import quoteattr

from vhost.option import DEFAULT_QUEUES, Options

XML = """\
<!-- The domain must share its memory:
     <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
     Once it starts, the guest can be made to outlive the daemon; a socket that cannot be opened is waited for then,
     in silence: <reconnect enabled='yes' timeout='1'/> within <source>. -->
<disk type='vhostuser' device='disk'>
  <driver name='qemu' type='raw'{queues}/>
  <source type='unix' path={path}/>
  <target dev='vda' bus='virtio'/>
</disk>
"""


def disk_xml(options: Options) -> str:
    """What `virsh attach-device` takes; type='raw' is what the guest sees. *options* names a socket path.

    QEMU's working directory is another, so the path is made absolute.
    """
    assert options.socket_path is not None
    queues = "" if options.num_queues == DEFAULT_QUEUES else f" queues='{options.num_queues}'"
    return XML.format(queues=queues, path=quoteattr(os.path.abspath(options.socket_path)))

"""`vhost-user-qcow2 libvirt-xml`: what a domain's XML says of a disk that the daemon serves with the same options."""

from xml.sax.saxutils import quoteattr

from vhost.option import DEFAULT_QUEUES, Options

XML = """\
<domain>
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
  <devices>
    <disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw'{queues}/>
      <source type='unix' path={path}>
        <reconnect enabled='yes' timeout='1'/>
      </source>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


def domain_xml(options: Options) -> str:
    """The parts of a domain that concern the disk; type='raw' is what the guest sees. *options* names a socket path."""
    assert options.socket_path is not None
    queues = "" if options.num_queues == DEFAULT_QUEUES else f" queues='{options.num_queues}'"
    return XML.format(queues=queues, path=quoteattr(options.socket_path))
